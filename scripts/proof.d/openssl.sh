# What OpenSSL computes, with each of the code paths that it has for different CPUs. The lines printed do not depend on
# the machine; what two runs can tell only by themselves (random keys) fails here.
set -eu
mkdir -p /root/openssl && cd /root/openssl
seq 1 50000 >plain
key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
providers='-provider legacy -provider default'
failed=
# Key wrapping is for keys, and not for files.
ciphers=$(openssl enc -list | grep -oE -- '-[A-Za-z0-9-]+' | grep -v -i wrap | sort -u)
digests=$(openssl dgst -list | grep -oE -- '-[a-z0-9-]+' | sort -u)

# Too short keys are filled up and too long ones cut off, with a warning.
each_cipher() {
    for cipher in $ciphers; do
        # shellcheck disable=SC2086 # the list of providers is meant to be split, here and below
        if openssl enc $providers "$cipher" -K $key -iv 00112233445566778899aabbccddeeff -in plain -out sealed 2>error; then
            echo "$cipher $(sha256sum <sealed)"
            openssl enc -d $providers "$cipher" -K $key -iv 00112233445566778899aabbccddeeff -in sealed 2>/dev/null |
                cmp -s - plain || failed="$failed $1$cipher"
        else
            echo "$cipher cannot be used here"
        fi
    done
}
each_digest() {
    for digest in $digests; do
        for size in 0 1 63 64 65 1000 200000; do
            # shellcheck disable=SC2086
            echo "$digest $size $(head -c $size plain | openssl dgst $providers "$digest" 2>/dev/null | sed 's/.*= //')"
        done
        echo "$digest hmac $(openssl dgst -hmac key "$digest" plain 2>/dev/null | sed 's/.*= //')"
    done
}
each_kdf() {
    openssl kdf -keylen 32 -kdfopt digest:SHA512 -kdfopt pass:proof -kdfopt salt:salt -kdfopt iter:2000 PBKDF2
    openssl kdf -keylen 32 -kdfopt pass:proof -kdfopt salt:salt -kdfopt n:1024 -kdfopt r:8 -kdfopt p:4 SCRYPT
    openssl kdf -keylen 42 -kdfopt digest:SHA256 -kdfopt key:proof -kdfopt salt:salt HKDF
    half=000102030405060708090a0b0c0d0e0f
    openssl mac -cipher AES-128-GCM -macopt hexkey:$half -macopt hexiv:000102030405060708090a0b -in plain GMAC
    openssl mac -cipher AES-256-CBC -macopt hexkey:$key -in plain CMAC
    openssl mac -macopt hexkey:$key -in plain POLY1305
    openssl mac -macopt hexkey:$key -in plain KMAC-256
    openssl mac -macopt hexkey:$half -in plain SIPHASH
}
# Private keys that are given and not drawn: RFC 8410's and RFC 5915's encodings around the same bytes.
each_curve() {
    for curve in ed25519:302e020100300506032b657004220420:64 x25519:302e020100300506032b656e04220420:64 \
        P-256:30310201010420:64:a00a06082a8648ce3d030107 secp256k1:302e0201010420:64:a00706052b8104000a; do
        name=${curve%%:*} rest=${curve#*:}
        prefix=${rest%%:*} suffix=
        case $rest in *:*:*) suffix=${rest##*:} ;; esac
        echo "$prefix$key$suffix" | sed 's/../\\x&/g' | tr -d '\n' | xargs -0 printf '%b' >"$name.key"
        openssl pkey -inform DER -in "$name.key" -pubout -out "$name.public"
        echo "$name $(sha256sum <"$name.public")"
    done
    openssl pkeyutl -sign -rawin -inkey ed25519.key -keyform DER -in plain -out signature
    echo "ed25519 signature $(sha256sum <signature)"
    openssl pkeyutl -verify -rawin -pubin -inkey ed25519.public -in plain -sigfile signature
    openssl pkeyutl -derive -inkey x25519.key -keyform DER -peerkey x25519.public | sha256sum
    openssl prime -hex ffffffffffffffffc90fdaa22168c234c4c6628b80dc1cd129024e088a67cc74020bbea63b139b22514a08798e3404ddef9519b3cd3a431b302b0a6df25f14374fe1356d6d51c245e485b576625e7ec6f44c42e9a63a3620ffffffffffffffff
}
there_and_back() {
    for kind in 'RSA -pkeyopt rsa_keygen_bits:2048' 'EC -pkeyopt ec_paramgen_curve:P-256' \
        'EC -pkeyopt ec_paramgen_curve:P-384' 'EC -pkeyopt ec_paramgen_curve:P-521' \
        'EC -pkeyopt ec_paramgen_curve:brainpoolP256r1' 'EC -pkeyopt ec_paramgen_curve:sect283k1'; do
        # shellcheck disable=SC2086
        openssl genpkey -algorithm $kind -out key 2>/dev/null
        openssl pkey -in key -pubout -out public
        openssl pkey -in key -check -noout >/dev/null
        openssl dgst -sha256 -sign key -out signature plain
        openssl dgst -sha256 -verify public -signature signature plain >/dev/null || failed="$failed $1-$kind"
        printf x >>plain
        ! openssl dgst -sha256 -verify public -signature signature plain >/dev/null 2>&1 || failed="$failed $1-$kind(forged)"
        seq 1 50000 >plain
    done
}

# Capabilities that OpenSSL is told of, as its OPENSSL_ia32cap(3): all, none, no AES and carry-less multiplication, no
# AVX, none of CPUID leaf 7 (AVX2, BMI, ADX, SHA).
for capabilities in all :0 ~0x200000200000000 ~0x1000000000000000 0:0; do
    echo "== $capabilities" | tee /dev/stderr
    [ $capabilities = all ] || export OPENSSL_ia32cap=$capabilities
    { each_cipher "$capabilities"; each_digest; each_kdf; each_curve; } >out
    cat out
    [ -e first ] || cp out first
    cmp -s first out || { failed="$failed $capabilities"; diff first out >&2 || true; }
    there_and_back "$capabilities"
done
unset OPENSSL_ia32cap
echo "== speed" >&2
for cipher in aes-256-gcm aes-128-cbc-hmac-sha256 chacha20-poly1305; do
    openssl speed -seconds 1 -evp $cipher >speed 2>&1 || { failed="$failed speed-$cipher"; tail speed >&2; }
    tail -n 1 speed >&2
done
openssl speed -seconds 1 sha256 rsa2048 dsa2048 ecdsap256 ecdhx25519 ed25519 >speed 2>&1 || { failed="$failed speed"; tail speed >&2; }
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
