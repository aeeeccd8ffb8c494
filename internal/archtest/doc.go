// Package archtest holds the rules of the house as tests: who may import whom,
// which calls are banned where, a comment on each package. Each rule carries
// its reason, and a failing test prints it: the rule is there to be understood,
// and to be changed here, with a better reason, where it is wrong.
package archtest
