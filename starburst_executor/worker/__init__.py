"""The worker's side: claim, run, commit."""
