"""Models on held-out data: pairs, answers, judges, intervals."""
