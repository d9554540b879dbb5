"""scikit-learn: an unmodified grid search on workers, through the joblib backend."""

from __future__ import annotations

import time

import joblib  # type: ignore[import-untyped]
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import (  # type: ignore[import-untyped]
    GridSearchCV,
    cross_val_score,
)
from sklearn.svm import SVC  # type: ignore[import-untyped]

import starburst_executor.joblib_backend  # noqa: F401  makes backend="starburst" known

images, digits = load_digits(return_X_y=True)
grid = {"C": [0.1, 1, 10], "gamma": [0.0001, 0.001, 0.01]}

# Arguments other than n_jobs go to StarburstExecutor, such as store="s3://bucket/prefix".
with joblib.parallel_config(backend="starburst", n_jobs=2):
    began = time.perf_counter()
    search = GridSearchCV(SVC(), grid, cv=3).fit(images, digits)
    seconds = time.perf_counter() - began
    scores = cross_val_score(search.best_estimator_, images, digits, cv=5)

fits = 3 * len(search.cv_results_["params"])
print(f"{fits} fits of {len(images):,} images in {seconds:.1f} s\n")
print("accuracy   gamma" + "".join(f"{gamma:>9}" for gamma in grid["gamma"]))
means = search.cv_results_["mean_test_score"].reshape(len(grid["C"]), -1)
for c, row in zip(grid["C"], means, strict=True):
    print(f"     C {c:>8} " + "".join(f"{mean:9.3f}" for mean in row))
print(f"\nbest: {search.best_params_}, {scores.mean():.1%} correct in 5 folds")
