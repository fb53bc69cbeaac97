"""What a run leaves behind: folder, records, metrics, manifests of checkpoints; and how it is stopped."""
