"""Named byte strings with S3's guarantees: the seam, and the directory that keeps its promise."""
