"""One file is one experiment: it defines CONFIG and, where the structure of the model changes, MODEL."""
