"""What bench.latency is made of: pictures, worker processes, the machine's peaks and noise, work, report."""
