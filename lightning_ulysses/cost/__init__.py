"""What training costs: operations of a model, and what a device can do."""
