// Package deploy holds what puts blockstep onto hosts: packages, a container,
// an Ansible role, alerts and a dashboard. Its Go is only the tests that keep
// them true to the program.
package deploy
