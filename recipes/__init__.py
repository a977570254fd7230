"""Entry points: `python -m recipes.dpo loss=ipo model=mistral7b`."""
