"""From what a user names to tensors: datasets, images, processors, augmentation, loaders, devices; YAML."""
