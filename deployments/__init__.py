"""What runs where: deployments, presets and sweeps that are shipped, containers, and servers on this machine."""
