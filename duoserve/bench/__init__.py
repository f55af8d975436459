"""What a schedule is worth: `python -m duoserve.bench`."""
