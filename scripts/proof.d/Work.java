import java.math.BigInteger;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
import java.util.zip.*;

/** Prints what must not depend on how it is run; see runtimes.sh. */
public class Work {
    interface Shape { double area(); }
    record Circle(double radius) implements Shape { public double area() { return Math.PI * radius * radius; } }
    record Box(double width, double height) implements Shape { public double area() { return width * height; } }

    static long fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

    static void round(int round) throws Exception {
        Random random = new Random(round);
        byte[] bytes = new byte[1 << 18];
        random.nextBytes(bytes);
        System.out.println(HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(bytes)));
        System.out.println(fibonacci(25));
        BigInteger product = BigInteger.ONE;
        for (int i = 1; i < 600; i++) product = product.multiply(BigInteger.valueOf(i));
        System.out.println(product.hashCode());
        Map<String, Integer> counts = new TreeMap<>();
        for (int i = 0; i < 20000; i++) counts.merge("k" + i * 7919 % 503, i, Integer::sum);
        System.out.println(counts.hashCode());
        Shape[] shapes = new Shape[1000];
        for (int i = 0; i < shapes.length; i++) shapes[i] = i % 3 == 0 ? new Circle(i) : new Box(i, i + .5);
        double area = 0;
        for (int k = 0; k < 50; k++) for (Shape shape : shapes) area += shape.area();
        System.out.println(area);
        compress(bytes);
        threads();
        garbage(random);
        exceptions();
        int[] numbers = random.ints(50000).toArray(), copy = numbers.clone();
        Arrays.sort(numbers);
        Arrays.parallelSort(copy);
        System.out.println(Arrays.hashCode(numbers) + " " + Arrays.equals(numbers, copy));
    }

    static void compress(byte[] bytes) throws Exception {
        for (int i = 0; i < bytes.length; i++) bytes[i] &= 15;
        Deflater deflater = new Deflater();
        deflater.setInput(bytes);
        deflater.finish();
        byte[] packed = new byte[bytes.length * 2], back = new byte[bytes.length];
        int length = deflater.deflate(packed);
        Inflater inflater = new Inflater();
        inflater.setInput(packed, 0, length);
        inflater.inflate(back);
        CRC32 crc = new CRC32();
        crc.update(back);
        System.out.println(crc.getValue() + " " + Arrays.equals(bytes, back));
    }

    static void threads() throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(6);
        AtomicLong atomic = new AtomicLong();
        LongAdder adder = new LongAdder();
        ConcurrentHashMap<Integer, Integer> map = new ConcurrentHashMap<>();
        long[] guarded = new long[1];
        List<Future<?>> all = new ArrayList<>();
        for (int w = 0; w < 12; w++) {
            all.add(pool.submit(() -> {
                for (int i = 0; i < 5000; i++) {
                    atomic.incrementAndGet();
                    adder.increment();
                    map.merge(i % 97, 1, Integer::sum);
                    synchronized (guarded) { guarded[0]++; }
                }
            }));
        }
        for (Future<?> one : all) one.get();
        pool.shutdown();
        int merged = map.values().stream().mapToInt(i -> i).sum();
        System.out.println(atomic + " " + adder + " " + guarded[0] + " " + merged);
    }

    static void garbage(Random random) {
        List<byte[]> kept = new ArrayList<>();
        long total = 0;
        for (int i = 0; i < 10000; i++) {
            byte[] one = new byte[random.nextInt(8000)];
            Arrays.fill(one, (byte) i);
            total += one.length;
            if (i % 10 == 0) kept.add(one);
            if (kept.size() > 400) kept.remove(random.nextInt(kept.size()));
        }
        for (byte[] one : kept) for (byte b : one) total += b;
        System.out.println(total + " " + kept.size());
    }

    /** Compiled code leaves these checks to the processor's faults. */
    static void exceptions() {
        String[] some = new String[3];
        int caught = 0;
        for (int i = 0; i < 5000; i++) {
            try {
                caught += 100 / (i % 3);
                caught += some[i % 4].length();
            } catch (NullPointerException e) {
                caught += 1;
            } catch (ArrayIndexOutOfBoundsException e) {
                caught += 2;
            } catch (ArithmeticException e) {
                caught += 3;
            }
        }
        System.out.println(caught);
    }

    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < 3; i++) round(i);
        long before = System.nanoTime();
        Thread.sleep(200);
        if (System.nanoTime() - before < 200_000_000) throw new Exception("woke up too early");
    }
}
