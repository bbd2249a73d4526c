"""The way of the data: text -> clean documents -> tokens -> batches."""
