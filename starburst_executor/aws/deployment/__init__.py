"""What an AWS account needs to run workers, deployed and removed as one stack."""
