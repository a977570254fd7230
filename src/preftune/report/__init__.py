"""What a run did, told from its directory alone: a table, a page, a comparison, the W&B workspace, the model card."""
