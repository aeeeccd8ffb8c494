// Package nbdtest is what tests of anything that speaks NBD use: Client, a
// small complete client whose wire code shares nothing with the server's;
// MemDevice, an export in memory that does what a replicated volume does, and
// wrappers that delay, fail or log what any export does.
package nbdtest
