"""The processes of a run: one, torchrun's, a cluster's, a sweep's."""
