"""Getting state into CPU memory: reserved slots, copies that run beside training, and the fence that keeps them whole."""
