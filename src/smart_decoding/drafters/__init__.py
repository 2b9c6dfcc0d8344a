"""What drafts. The names are here, apart from all that needs a model, so that a command line can know them."""

METHODS = ("eagle", "draft_model", "ngram", "recycling", "union", "none")
