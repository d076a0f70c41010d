"""What the compressor is made of: the checks before a run, the trials of edits, the record of them."""
