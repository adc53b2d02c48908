"""What one does with a masked-diffusion model: likelihood, sampling, orders, trajectories."""
