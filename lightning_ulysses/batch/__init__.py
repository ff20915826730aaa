"""Cuts a dataloader's batch into slices, and joins the slices that ``predict_step`` returns."""
