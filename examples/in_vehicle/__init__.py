"""An in-vehicle unit: collects while driving, trains while parked and charging."""
