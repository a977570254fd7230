"""What a command line may say: names, types, combinations and remedies, before torch is imported."""
