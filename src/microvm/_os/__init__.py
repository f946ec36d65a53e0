"""What differs between operating systems; apart from the backends, the only code that reads ``sys.platform``."""
