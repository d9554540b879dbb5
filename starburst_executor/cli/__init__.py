"""The command `starburst-executor`: a module for each group of verbs."""
