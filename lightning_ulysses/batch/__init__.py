"""From a dataloader's batch to a rank's slice, and from what a step returns back to whole sequences."""
