"""The preference data that preftune ships, train.jsonl and eval.jsonl (README.md beside it says how it was made)."""
