"""What an auditor asks of a run; each part says what it could have seen."""
