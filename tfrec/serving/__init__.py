"""serving: runs a bundle. Nothing here imports TensorFlow, directly or through anything."""
