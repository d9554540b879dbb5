"""Objects with S3's guarantees: the store's interface, and a directory that implements it."""
