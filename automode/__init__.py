"""automode."""
