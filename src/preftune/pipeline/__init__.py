"""Stages with lineage: SFT, preference training, rounds, evaluation, export."""
