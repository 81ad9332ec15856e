"""The load generator behind `heatlens bench`: real requests, counted and timed, at little cost to the client."""
