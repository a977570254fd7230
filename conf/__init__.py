"""preftune's configuration: one file a choice. A package, so that Hydra finds it from any kind of install."""
