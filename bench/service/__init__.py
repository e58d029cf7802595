"""`gemvg serve` under load: a service in a process of its own, and clients that know every right answer."""
