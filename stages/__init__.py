"""The science: nouns, and the verbs extract, train, finetune and score. Knows nothing of the command line."""
