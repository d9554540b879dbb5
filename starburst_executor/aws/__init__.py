"""Everything that speaks to AWS. Nothing outside this package imports boto3."""
