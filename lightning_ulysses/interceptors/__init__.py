"""One file for each caller of attention, dropout or checkpointing that is taken over while a batch is split."""
