"""What runs on the training instance: storage, checkpoints, datasets and the agent."""
