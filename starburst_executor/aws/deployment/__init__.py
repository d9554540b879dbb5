"""What an account needs before workers can run there: deployed and removed as one stack."""
