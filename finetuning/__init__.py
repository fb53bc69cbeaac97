"""What the lessons that fine-tune a language model share: questions, tokens, models, answers and their scores."""
