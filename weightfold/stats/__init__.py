"""What is observed on data: how a batch is run, what layers read on the way, what norms gather."""
