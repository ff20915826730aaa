"""The cost of training: operations of a model, and peak rates of devices."""
