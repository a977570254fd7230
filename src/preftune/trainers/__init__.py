"""Config groups in, one TRL trainer out, with metrics beside TRL's."""
