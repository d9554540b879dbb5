"""Workers as ECS tasks on Fargate or EC2: launching, watching and diagnosing them."""
