"""Sessions: OpenAI chat completions whose token ids are recorded, and never made anew from text."""
