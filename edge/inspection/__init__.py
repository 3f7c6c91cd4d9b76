"""One verdict per part: triggers, stations of several views, deadlines, and what a PLC reads."""
