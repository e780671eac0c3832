"""What is known of a model from its `config.json` alone; imports no torch."""
