"""What a run will take, without a GPU: one rank of a step on tensors without memory, and plans made from that."""
