"""What lies in a zoo's folder: the catalogue, blobs, contents; their changes and checks."""
