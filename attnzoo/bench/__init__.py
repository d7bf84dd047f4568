"""What things cost: parameters, FLOPs, time, memory."""
